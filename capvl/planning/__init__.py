"""What a train step needs on chips that aren't here: compiled ahead of time, or on paper."""
