"""python -m tests.budgets [--store 1|all] [GROUP ...]: every number, as it is stored and as it is counted now."""

import argparse
import sys

from tests.budgets import GROUPS, UNITS, changes, counted, kept, read, versions, why_not, write


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all without one")
    parser.add_argument("--store", default="", choices=["", "1", "all"], help="new and lower numbers, or all")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"GROUP must be of {', '.join(GROUPS)}, got {', '.join(sorted(unknown))}")
    budgets, failed = read(), False
    for group in options.groups or GROUPS:
        stored = budgets.get(group)
        if reason := why_not(group, None if options.store else stored):
            print(f"{group}: not counted, {reason}\n")
            continue
        found, here = counted(group), versions(group)
        title = f"{group}, with {', '.join(f'{tool} {number}' for tool, number in here.items())}"
        print(f"{title:<68}{'stored':>12}{'now':>12}")
        found_changes = changes(stored or {}, found)
        print(*found_changes, "", sep="\n")
        failed |= any(change.verdict in ("higher", "new", "gone") for change in found_changes)
        if options.store:
            same = stored is not None and stored["with"] == here
            write({**read(), group: {"with": here, **kept(stored if same else {}, found, options.store)}})
    for unit, meaning in UNITS.items():
        print(f"{unit}: {meaning}")
    if failed and not options.store:
        sys.exit("A number above its budget by 5 %, new or gone: `make budgets STORE=1` stores new and lower ones")


if __name__ == "__main__":
    main()
