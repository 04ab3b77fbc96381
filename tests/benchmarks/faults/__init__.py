"""Seeded faults and healthy runs of small training programs: what `bench_faults.py` scores a monitor on.

A program (`classifier.py`, `language.py`, ...) builds a `Training`: a model with made-up but learnable data and the
pieces of its loop. A fault is a function that edits those pieces, with the truth beside it: which findings name it, in
which module, and from which step it can be seen. A healthy run is a program, or a variant that is no fault.

Where the classes of faults come from, as the docstrings name them:

- TheDeepChecker: Ben Braiek and Khomh, "Testing Feedforward Neural Networks Training Programs", arXiv:2204.00694.
- SageMaker: the built-in rules of Amazon SageMaker Debugger, closed to new customers since 2026-07-30.
- TrainCheck: Jiang et al., "Training with Confidence", OSDI 2025, arXiv:2506.14813, and the issues that it reproduces.
- GRIST: Yan et al., "Exposing Numerical Bugs in Deep Learning via Gradient Back-Propagation", ESEC/FSE 2021.
- Humbatova: Humbatova et al., "Taxonomy of Real Faults in Deep Learning Systems", ICSE 2020, arXiv:1910.11015.
- AutoTrainer: Zhang et al., "AutoTrainer: An Automatic DNN Training Problem Detection and Repair System", ICSE 2021.
- UMLAUT: Schoop et al., "UMLAUT: Debugging Deep Learning Programs using Program Structure and Model Behavior", CHI 2021.
- speech: issues of speech toolkits; they and other repositories are named as owner/name#number.

Each folder is a set of cases. `written` was made beside the watches. The authors of `blind_1` to `blind_7` had seen no watch, only
programs, symptoms and literature. A blind set is run once; when its misses have been looked at, it is as seen as `written`, and
a new one is made. The last two are held out: nobody runs or reads them while watches are written.
"""
