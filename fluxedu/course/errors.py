"""What can be wrong with a question to the course."""


class CourseError(ValueError):
    """An exercise, a prediction or a notebook that is not there or not as it should be."""
