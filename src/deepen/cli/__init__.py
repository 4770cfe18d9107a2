"""The command line, one file a verb; a verb imports torch when it needs it."""
