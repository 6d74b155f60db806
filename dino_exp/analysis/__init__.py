"""Read-only views of runs: tables, pictures and pages. Opens runs, changes none, and trains nothing."""
