"""The vehicle's side of releases: fetch, verify, try, run, and go back if need be.

One folder holds all that a vehicle knows:

```
root.json             what it trusts, put there when it was set up
device.json           who it is, and where its releases come from
device.pem            the key that signs its reports
metadata/             the newest verified metadata of the store
channel.json          the newest verified word on what to run
staging/<sha256>.part a download, perhaps of another day
slots/a, slots/b      model.fpk, model.onnx and manifest.json each
state.json            which slot runs; replacing it is the one commit point
```

Nothing that comes from outside is believed before it is verified, the slot that runs is never
written to, and a new release runs only after it has passed a trial.
"""
