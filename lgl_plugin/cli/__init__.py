"""The command `lgl`, a file for each verb."""
