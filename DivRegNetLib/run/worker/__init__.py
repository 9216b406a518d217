"""Registrations in a process of its own, which can be watched, cancelled and killed without harming its parent.

:class:`Worker` is the parent's side of one registration, and :class:`Standby` keeps its process for the next. Both need
neither torch nor 3D Slicer; ``python -m DivRegNetLib.run.worker FOLDER`` is the child's side. See
:mod:`DivRegNetLib.run.worker.protocol` for what they say to each other.
"""

from DivRegNetLib.run.worker.parent import Worker
from DivRegNetLib.run.worker.protocol import Event, WorkerDied
from DivRegNetLib.run.worker.standby import Standby

__all__ = ["Event", "Standby", "Worker", "WorkerDied"]
