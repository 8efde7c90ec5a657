"""The course: exercises that are checked, predictions that are scored, notebooks that are made from one source."""

from fluxedu.course.check import Verdict, check
from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.course.predict import predict, score
from fluxedu.course.where import begin, where
from fluxedu.errors import CourseError

__all__ = ["CourseError", "Exercise", "Verdict", "all_exercises", "begin", "check", "predict", "score", "where"]
