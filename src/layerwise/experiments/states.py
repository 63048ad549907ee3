"""States of a run in a sweep, in words."""

FINISHED, UNFINISHED, TO_DO = "finished", "unfinished", "to do"
ELSEWHERE, DIVERGED = "in another process", "diverged"
FAILED = "failed"  # refused where it was to be trained, or its workers were lost
