"""The one exception that is meant to be read by a person."""


class UserError(Exception):
    """What is wrong with the input, where (file, line or key), and what to do about it.

    A stage prints its message on one line and exits with status 1; anything else is a defect and keeps its traceback.
    """
