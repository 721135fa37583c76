"""A process that lends memory to a Mooncake Store, and does there what a stranger could. Run as a script.

    python mooncake_owner.py MASTER:PORT BYTES

It says `ready`, then answers each line of its input, `["remove", KEY]` or `["replace", KEY, HEX]`, with a number. It
ends with its input.
"""

from __future__ import annotations

import ctypes
import json
import sys


def main(master: str, nbytes: int) -> None:
    from mooncake.store import MooncakeDistributedStore, ReplicateConfig

    store = MooncakeDistributedStore()
    if store.setup("127.0.0.1", "P2PHANDSHAKE", nbytes, 2**20, "tcp", "", master) != 0:
        raise SystemExit("no set-up")
    print("ready", flush=True)
    for line in sys.stdin:
        action, key, *more = json.loads(line)
        code = store.remove(key, True)
        if action == "replace":
            octets = bytes.fromhex(more[0])
            memory = ctypes.create_string_buffer(octets, len(octets))
            code = store.batch_put_from([key], [ctypes.addressof(memory)], [len(octets)], ReplicateConfig())[0]
        print(code, flush=True)
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
