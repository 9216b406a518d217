"""Numbers of the evidence (DivRegNetLib/quality/evidence.py) of a right and of a wrong registration of a head."""

RIGHT = {
    "motion 1": 0.1, "soft motion 1": 1.0, "moved 1": 0.0, "motion 2": 0.02, "moved 2": 0.0, "moved 4": 0.0,
    "trend 1": 0.02, "trend 2": 0.01, "trend 4": 0.01,
    "fixed edges 1": 0.92, "bend": 0.4, "slope": 0.1, "covered": 1.0, "overlap": 0.98, "voxel_mm": 2.0, "diagonal_mm": 280.0,
}  # fmt: skip
WRONG = RIGHT | {
    "motion 1": 2.4, "soft motion 1": 2.3, "moved 1": 0.8, "motion 2": 1.7, "moved 2": 0.5, "moved 4": 0.3,
    "trend 1": 0.8, "trend 2": 0.6, "trend 4": 0.4,
    "fixed edges 1": 0.5, "bend": 2.2,
}  # fmt: skip
