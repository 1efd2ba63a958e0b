"""From the words of a command line to a verb and an exit code."""
