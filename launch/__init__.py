"""`python -m launch`: starts the ranks of a run through the DeepSpeed launcher, passes signals on, leaves no orphan behind.

README.md beside this file is for users. Who starts whom on one node, and what each is for (on many, head.py is above it all):

    python -m launch                      cli.py, supervisor.py: signals, end, exit code
      deepspeed.launcher.launch           DeepSpeed's own launcher: environment of the ranks
        launch.rank (one per rank)        front.py: what DeepSpeed's launcher sees and may kill
      launch.rank (one per rank)          keeper.py: detached from the front; owns the rank and its output
        python -m simmim_scale ...        the rank

Why the rank is not a child of DeepSpeed's launcher: on SIGTERM, and whenever one rank exits with a code other than 0, that
launcher ends the process tree of one rank after another: SIGTERM to every process in it, data workers too, 30 seconds, SIGKILL.
A save that takes longer is cut off, a save that needs its workers or its peers fails, and "preempted" looks like a crash. When
that launcher is killed itself, its ranks run on with nobody to stop them. So what it sees is a front without the rank below it.
The front ends with 0 whatever the rank did; the supervisor hears the truth over a socket and decides for all ranks at once, and
every keeper that loses its supervisor or its front stops its rank by itself.
"""
