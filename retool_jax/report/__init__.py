"""What a run's folder says, for people: analysis, one self-contained page, pictures."""
