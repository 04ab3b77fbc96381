"""`stethoscope run`: a monitor for a training script that knows nothing of it.

`cli/_run.py` replaces itself by the script's own interpreter; `startup/sitecustomize.py` is what that one runs first, in each
process below; `_start.py` waits until torch is there; `_script.py` listens to torch's global hooks, finds what is trained
(`_find.py`) and the loss (`_loss.py`), and drives one `Monitor` per model (`_session.py`); `_say.py` has the last word.
Nothing of torch is imported before the script does it.
"""
