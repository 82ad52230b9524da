"""Read the files of evaluation tasks as they are published: a small reader for each layout."""
