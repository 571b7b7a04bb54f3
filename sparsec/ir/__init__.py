"""The intermediate representation: data, text, checks and a reference interpreter. It knows no dialect."""
