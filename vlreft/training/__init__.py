"""The trainer, and what keeps a training whole: faults, several processes, answers as they come."""
