"""What following the proxy's log costs: lines per second, and a pass without new lines, beside their budgets.

The exit code is 1 if a budget is missed. The log is as nginx writes it, and parsing its JSON is included. The folder has
a fortnight of rotated logs of some sites. Both figures are CPU time of this process in the best of several rounds: other
work on the machine makes rounds slower, never faster.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from t23_middleware.relay.proxy_log import ProxyLog  # noqa: E402
from t23_middleware.transfer import play_id  # noqa: E402

LINES_PER_S = 50_000
IDLE_US = 100.0

#: Rotated logs of each of the sites in the folder.
SITES, DAYS = 5, 14


def main() -> int:
    """Print both figures; 0 where both budgets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--looks", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "t23.log"
        furnish(log, options.lines)
        rate = max(lines_per_s(log, options.lines) for _ in range(options.rounds))
        wait_until_cached(log)
        idle = min(idle_us(log, options.looks) for _ in range(options.rounds))
    fast, cheap = rate >= LINES_PER_S, idle <= IDLE_US
    print(f"lines read    {rate:10,.0f} /s   >= {LINES_PER_S:,} /s  {'ok' if fast else 'SLOW'}")
    print(f"an idle look  {idle:10,.1f} µs   <= {IDLE_US:,.0f} µs     {'ok' if cheap else 'OVER'}")
    return 0 if fast and cheap else 1


def furnish(log: Path, count: int) -> None:
    """A log of *count* lines, two rotated logs that are followed too, and other logs."""
    with log.open("wb") as file:
        for number in range(count):
            file.write(line(number))
    for sibling in (1, 2):
        log.with_name(f"{log.name}.{sibling}").write_bytes(line(count + sibling))
    for site in range(SITES):
        for day in range(DAYS):
            log.with_name(f"site{site}.access.log.{day}.gz").touch()


def line(number: int) -> bytes:
    """A line as nginx writes it."""
    text = (
        '{"t23":1,"play":"%s","end":%.3f,"seconds":12.345,"status":206,"body":5000000,"complete":"OK",'
        '"type":"video/mp4","range":"bytes 1000000-5999999/256000000","length":"5000000","cache":""}\n'
    )
    return (text % (play_id("4711-0123456789abcdef", number), 1_764_547_200 + number / 1000)).encode()


def lines_per_s(path: Path, count: int) -> float:
    """Read all of it in a relay's pieces."""
    log = ProxyLog(path, [])
    started, read, more = time.process_time(), 0, True
    while more:
        reading = log.read()
        log.committed(reading)
        read, more = read + len(reading.lines), reading.more
    spent = time.process_time() - started
    assert read == count + 2, f"{read} of {count + 2} lines"
    return read / spent


def wait_until_cached(log: Path) -> None:
    """A folder that changed in the last second is read in every pass; wait until it is not."""
    time.sleep(max(0.0, log.parent.stat().st_mtime + 1.1 - time.time()))


def idle_us(path: Path, looks: int) -> float:
    """CPU of a pass that finds nothing new, in µs."""
    log = ProxyLog(path, [])
    more = True
    while more:
        reading = log.read()
        log.committed(reading)
        more = reading.more
    started = time.process_time()
    for _ in range(looks):
        log.read()
    return (time.process_time() - started) / looks * 1e6


if __name__ == "__main__":
    sys.exit(main())
