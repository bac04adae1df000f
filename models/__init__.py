"""What is learnt and what is said: history, GraphSAGE, analytics, calibration, findings' reasons."""
