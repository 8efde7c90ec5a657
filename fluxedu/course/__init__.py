"""The course: exercises with checks, scored predictions, and notebooks built from one source."""

from fluxedu.course.check import Verdict, check, passed
from fluxedu.course.exercise import Exercise, all_exercises
from fluxedu.course.notebook import begin, compare, where
from fluxedu.course.predictions import predict, score
from fluxedu.errors import CourseError

__all__ = [
    "CourseError",
    "Exercise",
    "Verdict",
    "all_exercises",
    "begin",
    "check",
    "compare",
    "passed",
    "predict",
    "score",
    "where",
]
