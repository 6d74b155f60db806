"""What shows a training to people."""
