"""The command line: arguments, exit codes, printing. Reading verbs create nothing on disk and import no torch."""
