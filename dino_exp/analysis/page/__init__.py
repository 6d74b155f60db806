"""Reports as documents, and these as HTML pages of one file or as Markdown."""
