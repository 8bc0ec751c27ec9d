"""What a run needs and nobody edits: each file is one subject."""
