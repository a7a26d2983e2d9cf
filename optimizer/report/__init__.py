"""What a compile did and how fast the result runs, as data; the command line prints it."""
