"""The exercises, a file a notebook. Each is told in ``fluxedu.course.exercise``."""
