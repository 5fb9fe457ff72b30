"""What an Example becomes: transforms to arrays of fixed sizes, slots. Imports reading and what is below it."""
