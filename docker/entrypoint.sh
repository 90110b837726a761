#!/usr/bin/env bash
# Entry point: makes the database in an empty data folder, then becomes the server.
#
# Understands what users of the official image expect; docker/README.md lists it.
set -Eeuo pipefail

share=/usr/local/share/pg_siamese
scripts=/docker-entrypoint-initdb.d
# Is there while the data folder is being made: a folder with it is not fit for use.
mark=docker-initialising

say() {
    echo "docker-entrypoint: $*" >&2
}

fail() {
    say "error: $1"
    shift
    printf '  %s\n' "$@" >&2
    exit 1
}

# Take a variable's value from the file that NAME_FILE names; the default is the second argument.
from_file() {
    local name=$1 file=$1_FILE
    if [[ -n ${!name-} && -n ${!file-} ]]; then
        fail "both $name and $file are set: set one of them"
    fi
    if [[ -n ${!file-} ]]; then
        [[ -r ${!file} ]] || fail "$file names ${!file}, which can't be read"
        export "$name=$(< "${!file}")"
    elif [[ -z ${!name-} ]]; then
        export "$name=${2-}"
    fi
    unset "$file"
}

read_variables() {
    from_file POSTGRES_PASSWORD
    from_file POSTGRES_USER postgres
    from_file POSTGRES_DB "$POSTGRES_USER"
    from_file POSTGRES_INITDB_ARGS
    : "${POSTGRES_HOST_AUTH_METHOD:=}"
    if [[ $POSTGRES_HOST_AUTH_METHOD == trust ]]; then
        say 'warning: POSTGRES_HOST_AUTH_METHOD=trust: whoever reaches the port is let in,' \
            'as superuser too, without a password'
    elif [[ -z $POSTGRES_PASSWORD ]]; then
        fail 'the superuser has no password, and the database is not initialised without one' \
            'Set it:  docker run -e POSTGRES_PASSWORD=… (or POSTGRES_PASSWORD_FILE=/run/secrets/…)' \
            'or let everybody in without one:  -e POSTGRES_HOST_AUTH_METHOD=trust'
    fi
}

make_cluster() {
    local -a more=()
    # Words in quotes stay together, as on a command line.
    eval "more=($POSTGRES_INITDB_ARGS)"
    local -a password=()
    if [[ -n $POSTGRES_PASSWORD ]]; then
        password=(--pwfile=/dev/fd/3)
    fi
    # Connections to the container's own localhost, on which initdb decides, are as all others.
    local inside=scram-sha-256
    [[ $POSTGRES_HOST_AUTH_METHOD != trust ]] || inside=trust
    # jit off: compiling costs more than it saves in queries of milliseconds.
    initdb --no-instructions --username="$POSTGRES_USER" "${password[@]}" \
        --auth-local=trust --auth-host="$inside" \
        --encoding=UTF8 --locale=C.UTF-8 --data-checksums \
        --set listen_addresses='*' --set jit=off "${more[@]}" \
        3< <(printf '%s\n' "$POSTGRES_PASSWORD")
    touch "$PGDATA/$mark"
    # As whoever sets passwords chose it: md5, where initdb's arguments say so.
    local method=${POSTGRES_HOST_AUTH_METHOD:-$(postgres -D "$PGDATA" -C password_encryption)}
    printf '\nhost all all all %s\n' "$method" >> "$PGDATA/pg_hba.conf"
}

# psql as the superuser, in the new database unless told otherwise; stops at the first error.
run_sql() {
    psql --no-psqlrc --set ON_ERROR_STOP=1 --no-password --username "$POSTGRES_USER" \
        --dbname "$POSTGRES_DB" "$@"
}

make_database() {
    if [[ $POSTGRES_DB != postgres ]]; then
        run_sql --quiet --dbname postgres --set name="$POSTGRES_DB" <<< 'CREATE DATABASE :"name";'
    fi
    run_sql --quiet --set database="$POSTGRES_DB" --file "$share/database.sql"
}

run_scripts() {
    local file
    for file in "$scripts"/*; do
        case $file in
            *.sh)
                say "running $file"
                # Not executable: it is read into this shell, and may use its functions.
                if [[ -x $file ]]; then
                    "$file"
                else
                    set +u # which is this script's taste, not everybody's
                    # shellcheck source=/dev/null
                    . "$file"
                    set -u
                fi
                ;;
            *.sql)
                say "running $file"
                run_sql --file "$file"
                ;;
            *.sql.gz)
                say "running $file"
                gunzip --stdout "$file" | run_sql
                ;;
            "$scripts/*") ;; # the folder is empty
            *) say "ignoring $file: neither *.sh, *.sql nor *.sql.gz" ;;
        esac
    done
}

abandon() {
    say 'error: the database could not be made; what is above says why'
    if [[ -e $PGDATA/postmaster.pid ]]; then
        pg_ctl --silent --wait --mode immediate stop || true
    fi
}

# For the scripts, a server that nobody outside reaches, in the place where clients look by default.
initialise() {
    read_variables
    trap abandon EXIT
    trap 'exit 130' INT TERM # as process 1, this shell would ignore them
    make_cluster
    export PGUSER=$POSTGRES_USER PGDATABASE=$POSTGRES_DB
    local -a own=(-p 5432 -c listen_addresses= -c unix_socket_directories=/var/run/postgresql)
    local -a options=("$@" "${own[@]}")
    pg_ctl --silent --wait start --options "${options[*]@Q}"
    make_database
    run_scripts
    pg_ctl --silent --wait --mode fast stop
    trap - EXIT INT TERM
    unset PGUSER PGDATABASE
    rm "$PGDATA/$mark"
    say 'the database is made; starting the server'
}

check_data() {
    if [[ -e $PGDATA/$mark ]]; then
        fail "the data folder $PGDATA is half made: its initialisation was interrupted or failed" \
            'Remove the volume, or empty the folder, and start again.'
    fi
    local made major
    made=$(< "$PGDATA/PG_VERSION")
    major=$(postgres --version | sed -E 's/^[^0-9]*([0-9]+).*/\1/')
    if [[ $made != "$major" ]]; then
        fail "the data folder $PGDATA was made by PostgreSQL $made; this is PostgreSQL $major" \
            'Dump with the old version and restore with this one.'
    fi
}

# From 18 on data are below a folder of their major version; a volume in the place of old is overlooked.
check_volume() {
    local old=/var/lib/postgresql/data
    if [[ $PGDATA == "/var/lib/postgresql/$PG_MAJOR/docker" ]] \
        && { [[ -s $old/PG_VERSION ]] || grep -q " $old " /proc/self/mountinfo; }; then
        fail "there is a volume at $old, but from PostgreSQL 18 on data are in $PGDATA" \
            'Mount the volume at /var/lib/postgresql, or name the folder with PGDATA.'
    fi
}

main() {
    # Options alone are the server's.
    if [[ $# -eq 0 || ${1:0:1} == - ]]; then
        set -- postgres "$@"
    fi
    if [[ $1 != postgres ]]; then
        exec "$@"
    fi
    for word in "$@"; do
        case $word in
            --help | -\? | --version | -V | --describe-config | -C) exec "$@" ;;
        esac
    done
    if [[ $(id -u) -eq 0 ]]; then
        # PostgreSQL doesn't run as root. Whoever starts the container as root has a folder to give.
        mkdir -p "$PGDATA"
        find "$PGDATA" /run/postgresql ! -user postgres -exec chown postgres:postgres {} +
        exec setpriv --reuid postgres --regid postgres --init-groups "${BASH_SOURCE[0]}" "$@"
    fi
    check_volume
    umask 077
    mkdir -p "$PGDATA"
    chmod 0700 "$PGDATA" 2> /dev/null || true # not ours: initdb says so
    if [[ ! -s $PGDATA/PG_VERSION ]]; then
        initialise "${@:2}"
    else
        check_data
    fi
    unset POSTGRES_PASSWORD
    exec "$@"
}

main "$@"
