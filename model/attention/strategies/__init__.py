"""WHERE keys meet queries when the length is sharded."""
