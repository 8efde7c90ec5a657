"""The experiments behind the course's claims: ``make evidence`` computes them, and the notebooks show the results.

One module per question, with a function ``run(samples)`` that returns a table. ``python -m evidence NAME`` writes it to
``fluxedu/course/evidence/NAME.json``, together with the command, the versions and the number of samples;
``fluxedu.course.evidence.load(NAME)`` reads it. Every value is a :func:`evidence.intervals.share` or
:func:`evidence.intervals.median`, so each has its n and its 95 % interval.

An experiment takes minutes to an hour on one core. The experiments are in the repository only, their results also in
the wheel.
"""
