"""An attempt: one process that works on a run, from the settings to the exit code."""
