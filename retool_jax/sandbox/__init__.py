"""The code sandbox: warm isolated workers, a cold oracle, a doctor, a server and its client."""
