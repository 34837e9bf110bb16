"""The intermediate representation: a program, its blocks, its text, and what runs passes over it."""
