#!/usr/bin/env bash
# Build substitutes for the base images with mmdebstrap, on machines that reach Debian's packages but
# no image registry. They get the tags of the real images, so that the Dockerfile and
# docker-compose.yml need no change. Needs root, mmdebstrap and a running engine; takes a minute and a
# half.
#   deploy/stand-in-images.sh [WORK_FOLDER]
set -euo pipefail
work=${1:-$(mktemp -d)}
mkdir -p "$work"

# An image of a Debian with further packages: IMAGE RELEASE VARIANT PACKAGES [OPTION …]. mmdebstrap
# took 40 s for the first one, debootstrap 74 s.
debian() {
  local image=$1 release=$2 variant=$3 packages=$4 name=${1%%:*}
  local log=$work/$name.log root=$work/$name.tar
  shift 4
  # The real images have no manuals either, so that both have the same size.
  mmdebstrap --variant="$variant" --include="$packages" --dpkgopt=force-unsafe-io \
    --customize-hook='rm -rf "$1"/usr/share/doc "$1"/usr/share/man "$1"/usr/share/locale \
      "$1"/usr/share/info "$1"/usr/lib/python3*/test "$1"/var/log/*' \
    --customize-hook='find "$1"/usr -name __pycache__ -prune -exec rm -rf {} +' \
    "$@" "$release" "$root" 2>"$log" || { tail "$log" >&2; exit 1; }
  docker import "$root" "$image" >/dev/null
}

# HAProxy is from Debian 13, because Debian 12 has 2.6, which knows fewer settings.
debian haproxy-debian:3.0 trixie essential haproxy &
haproxy=$!
# Builds must trust the certificates of this machine. Real images contain neither of these files.
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$work/pip.conf"
debian python:3.11-slim-bookworm bookworm minbase \
  ca-certificates,python3,python3-venv,python3-pip,python-is-python3,usr-is-merged \
  --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
  --customize-hook='upload /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt' \
  --customize-hook="upload $work/pip.conf /etc/pip.conf"
wait "$haproxy"

mkdir -p "$work/postgres"
cat >"$work/postgres/entrypoint" <<'END'
#!/bin/bash
set -euo pipefail
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
data=/var/lib/postgresql/data
as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
if [ ! -s "$data/PG_VERSION" ]; then
  chown postgres "$data"
  install -m 600 -o postgres "$POSTGRES_PASSWORD_FILE" /tmp/password
  as_postgres initdb -D "$data" -U "$POSTGRES_USER" --encoding=UTF8 --locale=C.UTF-8 \
    --auth-host=scram-sha-256 --auth-local=trust --pwfile=/tmp/password
  rm /tmp/password
  echo "host all all all scram-sha-256" >>"$data/pg_hba.conf"
  as_postgres postgres --single -D "$data" postgres <<<"CREATE DATABASE $POSTGRES_DB;" >/dev/null
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups postgres -D "$data" -h '*' -k /tmp
END
chmod +x "$work/postgres/entrypoint"
cat >"$work/postgres/Dockerfile" <<'END'
FROM python:3.11-slim-bookworm
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-unsafe-io postgresql \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ && mkdir -p /var/lib/postgresql/data
COPY entrypoint /usr/local/bin/entrypoint
ENV PGHOST=/tmp
ENTRYPOINT ["/usr/local/bin/entrypoint"]
END

mkdir -p "$work/haproxy"
cat >"$work/haproxy/Dockerfile" <<'END'
FROM haproxy-debian:3.0
STOPSIGNAL SIGUSR1
USER haproxy
ENTRYPOINT ["haproxy", "-W", "-db", "-f"]
CMD ["/usr/local/etc/haproxy/haproxy.cfg"]
END
for image in postgres:16-bookworm haproxy:3.0; do
  name=${image%%:*}
  DOCKER_BUILDKIT=0 docker build --network host -t "$image" "$work/$name" >"$work/$name.log" 2>&1 \
    || { tail "$work/$name.log"; exit 1; }
done
