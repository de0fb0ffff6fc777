"""The kinds of entries in the daemon's log, and the names of their fields.

Rule 1: each kind has a number (MESSAGE_ID) that was drawn once (uuid4): never changed, never used for another kind.
People match on it and alert on it. systemd/gpujobd.catalog has a text for each, which `journalctl -x` shows.
Rule 2: the word of a kind is the entry's EVENT. Where it tells an event of our journal, it is that event's tag.
Rule 3: a field has one name in JSON lines and one in systemd's journal, and this is the one table of both. They are
formats: add, never rename.
"""

from __future__ import annotations

from typing import Final

MESSAGE_IDS: Final[dict[str, str]] = {
    # the daemon's life
    "ready": "66f8c7f4b8d840318aa0215ff738ce43",
    "start_refused": "4d41d886e3a34ea69f96d6108dbf113e",
    "stopping": "d221da1b203846608c31921d29a9711f",
    "grace_over": "f8c2ee0ca4c745b4b48f9b312d453cd4",
    "hurried": "ff517ba0309c4c5ead7f9cd1ed04bae0",
    "stopped": "1b1ed8a03ea24773a86300dfd3a8c049",
    "journal_dead": "a4be29165bb642d1a268c88f5cee7490",
    "crashed": "621c081adfff4e2fafb00594adeb4d68",
    "thread_crashed": "a023ee3f253b4dc99acb8562d3a6e2e2",
    # systemd and this log
    "watchdog_stuck": "58d75cf946bb4711a647558a8c144391",
    "watchdog_well": "480cd5ac84d34061aed17074f3a70118",
    "entries_dropped": "8bf992aac75c4520bb7b0b670385040c",
    # configuration
    "config_reloaded": "c9d395690603454c8c8d35f4522ddcc0",
    "config_refused": "45e03856dfa445dcacaedf879f3ffcc0",
    # the queue and the disk
    "queue_switched": "e346f6c7843a41988ac1a4f36ea74bbf",
    "disk_low": "8536b9629ef84ad6855d083b97cc62ad",
    "disk_enough": "edf3d97ef24c4062b4f9c0c2642365aa",
    "disk_filled": "65c19500c33744aa9f3f43b22ff8f813",
    "disk_freed": "c215922ab5c142b292367b79bb86647c",
    # the journal and the spool
    "journal_torn": "354498ec65a841faaf2c73c97c099bf5",
    "journal_lost": "0076438d27e14b9ea34e1cbabb815568",
    "snapshot_damaged": "7661b94bfd654e3f8889c717a402530a",
    "snapshot_failed": "52c1285be0284627a42a35513d18a428",
    "segments_dropped": "c5a5b0cd2d124593b2aa8be98665503f",
    "spill_failed": "43dda2d2426f4d2fab6a7e8b9a3c8b83",
    "files_swept": "4e434a66679e4224bf9858f5f5f528eb",
    "files_failed": "87bfecfef58641d09d8d5d17809031d9",
    "sweep_failed": "2563f5502fb04bfda4188a5ad5db8b67",
    "job_log_failed": "e5dda241aa9d4bdf94453f80aa5dacd5",
    # callers
    "callers_turned_away": "892718e85825451890411b2a522cfb76",
    "few_connections": "dcc9da5c10ff470f916752078f885007",
    "request_failed": "cb4747bdf3c04a04b1dc28d56e859fad",
    # devices and workers
    "device_fell_ill": "2ffd5ae7a4dc464594fe8ee1b5c60052",
    "device_recovered": "cad96d5128f14a09bb5e68fd3619a99d",
    "device_crowded": "1c4a956d6a3e49a587d49afe227568f2",
    "device_cleared": "64eadb4f4aa142e5a04242b75ade7b8e",
    "driver_mismatched": "3a63e9cd349845bfa9221369dbbbd5cc",
    "memory_returned": "fca5c1af7316442fb51ad5ceb470109f",
    "nvml_lost": "22442d17c3d446d6bb38faf998b9188e",
    "nvml_found": "043d4c3096434fd78990e595b2a0d3ec",
    "probe_failed": "71d82b01e84b4f72af07275ac4c310a9",
    "handler_loaded": "c175e60199694ddda1b97ea94334b14e",
    "worker_started": "5f1e15568cfb4401aff8812d3916b73e",
    "worker_printed": "9530d3b26809469181a65d76956096d3",
    "worker_ended": "04c3777ea0644ea49944e1c1fd6c7524",
    "worker_load": "0e1efb464cfa4a31a408a7d3c42fa164",
    "worker_silent": "577a4c0dfade4be19aadb7ea8c133f29",
    "worker_stalled": "46e091ad61e6412490eef84ee7dc89af",
    "worker_unkillable": "bacb27c273ef478e89c1834b9adee870",
    # jobs
    "submitted": "38d79e9dc04d4b118badbdde6e24cc31",
    "leased": "c060b1345e2c4dd2a05cdfa9ab8c373e",
    "checkpointed": "d21ccf9d609d4fe690bddbbce25de80c",
    "yield_requested": "27d4a02ce8ee4893a540f6f7aec47be0",
    "yielded": "6afa5a5ba01948488a78ad041ff6bf9a",
    "lease_lost": "e4bd8d80c08e4980b3f289f56b4ac203",
    "handler_load_failed": "9f573770d25e44b49359928e60e755fe",
    "canary_passed": "3a2986a9400c478883ae6d3d9ad6a23c",
    "paused": "f68bf382025b403b8ea84d4cb8c1ff78",
    "crash_loop": "c7d315a0828940069b434aabf6fdc077",
    "output_damaged": "7d9a04f9aafe46d68dddb45f663586c6",
    "resumed": "bc542f1e0aa441eeb1be8288dcc071a5",
    "priority_changed": "512797d84e95448dae282e7326bcf3b3",
    "moved_first": "babc84b96db84505bd5e0b52b58fda99",
    "completed": "7f405efb46da4fb2ac68ddbc1150ae7b",
    "failed": "42d6f720be4d41a5b7ef6fcecf204205",
    "cancelled": "9ac2e9caad354b88b24d2e2bca9dc406",
    "expired": "f68636c39d7c483e87ddebc04986e7b6",
    "removed": "0f2ac33d16d14f528d25999ae377e4cf",
}

FIELDS: Final[dict[str, str]] = {
    "event": "EVENT",
    "message_id": "MESSAGE_ID",
    "job_id": "JOB_ID",
    "tenant": "TENANT",
    "handler": "HANDLER",
    "device": "DEVICE",
    "attempt": "ATTEMPT",
    "reason": "REASON",
    "by_uid": "BY_UID",
    "worker_pid": "WORKER_PID",
    "queued_s": "QUEUED_S",
    "load_s": "LOAD_S",
    "read_s": "READ_S",
    "compute_s": "COMPUTE_S",
    "write_s": "WRITE_S",
    "sync_s": "SYNC_S",
    "total_s": "TOTAL_S",
    "items": "ITEMS",
    "failed": "FAILURES",
    "items_per_s": "ITEMS_PER_S",
    "forecast_error": "FORECAST_ERROR",
    "jobs": "JOBS",
    "version": "VERSION",
    "replay_s": "REPLAY_S",
    "dropped": "DROPPED",
}
"""What an entry may carry beside its message: name in a JSON line, name in systemd's journal."""

Extra = dict[str, object]


def kind(event: str, **fields: object) -> Extra:
    """What `extra=` of a log call gets: the kind of the entry, and its fields."""
    return {"event": event, "message_id": MESSAGE_IDS[event], **fields}
