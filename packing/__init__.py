"""What builds the files that are published: the sdist and the wheel, and the one-file program."""
