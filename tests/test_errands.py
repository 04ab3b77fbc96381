import subprocess
import sys

SCRIPT = """
import atexit

@atexit.register
def end():
    print(errands.run(lambda: 6 * 7).result(5))

from stethoscope._errands import Errands

errands = Errands("stethoscope-test")
errands.run(int).result(5)
"""


def test_what_ends_after_all_other_exit_handlers_still_finds_its_thread():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("42\n", "")
