"""What the user can mend."""


class InputError(ValueError):
    """Something that the user gave cannot be used: a checkpoint, a file, a text. The message is one line."""
