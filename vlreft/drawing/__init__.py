"""Pictures of where edits act and what they do."""
