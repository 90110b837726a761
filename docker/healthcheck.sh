#!/usr/bin/env bash
# Healthy: the server takes connections. Not healthy: while the entry point still initialises, with a
# server that only its scripts are to reach.
set -eu

[[ ! -e $PGDATA/docker-initialising ]]
# Where it really listens, whatever port and folders it was told: lines 4 to 6 of its pid file.
mapfile -t lines < "$PGDATA/postmaster.pid"
port=${lines[3]} socket=${lines[4]} address=${lines[5]}
if [[ -z $socket ]]; then
    [[ $address == '*' || $address == 0.0.0.0 ]] && address=127.0.0.1
    [[ $address == '::' ]] && address=::1
    socket=$address
fi
exec pg_isready --quiet --host "$socket" --port "$port"
