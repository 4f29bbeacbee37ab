"""A teacher's answers, stored once for any number of runs of stage one."""
