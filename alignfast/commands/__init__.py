"""The commands: each reads its options and calls what does the work. Nothing here is imported before it is needed."""
