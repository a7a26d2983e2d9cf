"""Side by side with other engines: one command per table."""
