"""Compare the first steps of every recipe that a CPU trains with recorded ones."""
