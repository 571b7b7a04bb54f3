"""What each command of the command line does; one module each, imported when the command runs."""
