#!/usr/bin/env bash
# Build the image and test it in containers like those of docker-compose.yml (unprivileged user, read-only root): a
# completion, a crash, SIGTERM, and a Prometheus that scrapes the server. Must run as root on Debian, and installs the
# packages it needs. No Docker engine is needed: podman builds and runs the image.
#
#   BASE_IMAGE, PIP_ARGS, BAKE_MODEL   as in the Dockerfile; BAKE_MODEL defaults to smollm2-135m
#   WORK                               folder that keeps layers for the next run; without it nothing is kept

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8

if [[ $EUID != 0 ]]; then
    echo "test-image: must run as root" >&2
    exit 1
fi
if [[ -z ${IN_MOUNT_NAMESPACE:-} ]]; then # mounts disappear with the namespace
    IN_MOUNT_NAMESPACE=1 exec unshare --mount "$PWD/deploy/test-image.sh"
fi

IMAGE=localhost/lightwell:test
KEY=key-of-the-test
WAIT_SECONDS=120
work=${WORK:-$(mktemp --directory --tmpdir="${TMPDIR:-/var/tmp}" lightwell-image.XXXXXX)}
mkdir -p "$work"
work=$(realpath "$work")

podman=(podman --root "$work/storage" --runroot "$work/run" --tmpdir "$work/libpod" --cgroup-manager cgroupfs
    --events-backend file)

pod() { "${podman[@]}" "$@"; }
say() { printf '\n== %s\n' "$*"; }
fail() {
    echo "test-image: $*" >&2
    exit 1
}

clean_up() {
    local status=$?
    trap - EXIT
    [[ $status == 0 ]] || pod logs --tail 40 server 2>/dev/null >&2 || true
    [[ -z ${prometheus_pid:-} ]] || kill "$prometheus_pid" 2>/dev/null || true
    pod rm --all --force --time 0 --volumes >/dev/null 2>&1 || true
    pod umount --all >/dev/null 2>&1 || true
    [[ -n ${WORK:-} ]] || rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# Tools

install_tools() {
    local missing=() tool
    for tool in podman crun catatonit debootstrap docker-compose curl; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    local folder=$work/prometheus
    PATH=$folder/usr/bin:$PATH
    if ((${#missing[@]})) || [[ ! -x $folder/usr/bin/promtool ]]; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null
        unpack_prometheus "$folder"
    fi
}

# Prometheus is unpacked but not installed, because Debian's package would start it.
unpack_prometheus() {
    local package
    mkdir -p "$1"
    (cd "$1" && apt-get download -qq --option APT::Sandbox::User=root prometheus promtool)
    for package in "$1"/*.deb; do
        dpkg-deb --extract "$package" "$1"
    done
}

# crun needs control groups version 2, which some hosts mount beside version 1.
mount_cgroups() {
    if [[ $(stat --file-system --format %T /sys/fs/cgroup) != cgroup2fs ]]; then
        umount --recursive /sys/fs/cgroup
        mount -t cgroup2 none /sys/fs/cgroup
    fi
}

# The image

base_image_of_dockerfile() {
    local version base
    version=$(sed -n 's/^ARG PYTHON_VERSION=//p' Dockerfile)
    base=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)
    echo "${base/'${PYTHON_VERSION}'/$version}"
}

choose_base_image() {
    base=${BASE_IMAGE:-$(base_image_of_dockerfile)}
    if ! pod image exists "$base" \
        && ! timeout 300 "${podman[@]}" pull --quiet --retry 0 "$base" >/dev/null 2>"$work/pull.log"; then
        tail -n 1 "$work/pull.log"
        say "$base cannot be pulled: making a base image from this machine's Python"
        base=localhost/lightwell-base:test
        pod image exists "$base" || make_base_image
    fi
    say "base image: $base"
}

# Debian's minimal system, with this machine's python3 in /usr/local, without its tests and static libraries.
make_base_image() {
    local root=$work/base suite prefix packages
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    prefix=$(python3 -c 'import sys; print(sys.base_prefix)')
    if [[ $prefix == /usr ]]; then
        packages=python3,python3-venv
    else
        packages=$(packages_of_libraries "$prefix" | paste -sd,)
    fi
    rm -rf "$root"
    debootstrap --variant=minbase --include="ca-certificates,$packages" "$suite" "$root" >"$work/debootstrap.log" 2>&1 \
        || fail "$(tail -n 5 "$work/debootstrap.log")"
    if [[ $prefix != /usr ]]; then
        (cd "$prefix" && tar --create --owner=0 --group=0 --exclude='__pycache__' --exclude='*.a' --exclude='*/test' \
            --exclude='*/site-packages/*' bin/python3* include lib) | tar --extract --directory "$root/usr/local"
        chroot "$root" ldconfig
    fi
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    tar --create --directory "$root" . | pod import --quiet - "$base" >/dev/null
    rm -rf "$root"
}

# Print the Debian packages of the shared libraries that the Python in $1 and its modules load.
packages_of_libraries() {
    local libraries
    libraries=$(find "$1/bin" "$1/lib" \( -name 'python3*' -o -name '*.so*' \) -type f -not -path '*/site-packages/*' \
        -not -name '_tkinter*' -exec ldd {} \; 2>/dev/null \
        | sed -n 's/.* => \(\/[^ ]*\) .*/\1/p' | sort -u | xargs realpath)
    # The libraries of that Python belong to no package.
    { xargs dpkg-query --search <<<"$libraries" 2>/dev/null || true; } | cut -d: -f1 | sort -u
}

build_image() {
    local arguments=(--build-arg "BASE_IMAGE=$base" --build-arg "PIP_ARGS=${PIP_ARGS:-}"
        --build-arg "BAKE_MODEL=${BAKE_MODEL:-smollm2-135m}" --secret "id=pip,src=$work/pip.conf") path
    python3 deploy/pip_config.py "$work/pip.conf" >"$work/pip-paths"
    while read -r path; do # files that this machine's pip configuration names
        [[ -z $path ]] || arguments+=(--volume "$path:$path:ro")
    done <"$work/pip-paths"
    pod build --quiet --format docker --network host --ulimit "nofile=$(ulimit -n):$(ulimit -n)" \
        --ulimit "nproc=$(ulimit -u):$(ulimit -u)" "${arguments[@]}" --tag "$IMAGE" .
    pod image inspect --format 'user {{.Config.User}}, {{len .RootFS.Layers}} layers, {{.Size}} bytes' "$IMAGE"
}

# Containers

# As in docker-compose.yml, but in the host's network, where Prometheus reaches the server on loopback.
run() {
    pod run --name server --cgroups disabled --log-driver k8s-file --read-only --tmpfs /tmp \
        --volume cache:/var/cache/lightwell --cap-drop all --security-opt no-new-privileges "$@"
}

run_server() {
    run --detach --network host --env LIGHTWELL_API_KEY="$KEY" --env LIGHTWELL_HOST=127.0.0.1 \
        --env LIGHTWELL_PORT="$port" "$@" "$IMAGE" >/dev/null
}

wait_until() {
    local what=$1 end=$((SECONDS + WAIT_SECONDS))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || fail "$what: timed out after $WAIT_SECONDS s"
        sleep 0.2
    done
}

is_healthy() { pod healthcheck run server; } # the HEALTHCHECK of the image

stop_server() {
    pod stop --time 40 server >/dev/null
    local code
    code=$(pod inspect --format '{{.State.ExitCode}}' server)
    [[ $code == 0 ]] || fail "after SIGTERM the server exited with $code"
    pod rm server >/dev/null
}

http_status() { curl --silent --output /dev/null --write-out '%{http_code}' "$@"; }

# Print the ids, on the host, of the container's processes whose command matches $1.
processes() { pgrep --full --ns "$(pod inspect --format '{{.State.Pid}}' server)" --nslist pid "$1"; }

check_confinement() {
    local pid status pids
    pids=$(processes '')
    [[ $(wc -l <<<"$pids") == 4 ]] || fail "expected init, supervisor, engine and API, found processes $pids"
    for pid in $pids; do
        status=$(</proc/"$pid"/status)
        grep -q $'^Uid:\t10001\t10001\t10001\t10001$' <<<"$status" || fail "process $pid runs as another user"
        grep -q $'^CapBnd:\t0*$' <<<"$status" || fail "process $pid can get capabilities"
        grep -q $'^NoNewPrivs:\t1$' <<<"$status" || fail "process $pid can get privileges"
        grep -q ' / / ro[, ]' /proc/"$pid"/mountinfo || fail "process $pid can write its root"
        echo "process $pid: $(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c1-80)"
    done
    if pod exec --user 0 server touch /file /opt/lightwell/file 2>"$work/touch.log"; then
        fail "root could write the root file system"
    fi
    cat "$work/touch.log"
}

check_api() {
    local url=http://127.0.0.1:$port model answer
    [[ $(http_status "$url/v1/models") == 401 ]] || fail "answered without a key"
    [[ $(http_status "$url/metrics") == 401 ]] || fail "showed metrics without a key"
    model=$(curl --fail --silent --oauth2-bearer "$KEY" "$url/v1/models" \
        | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
    answer=$(curl --fail --silent --oauth2-bearer "$KEY" "$url/v1/completions" --json \
        "{\"model\": \"$model\", \"prompt\": \"The capital of France is\", \"max_tokens\": 16, \"temperature\": 0}" \
        | python3 -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["text"].split("\n")[0])')
    [[ -n $answer ]] || fail "the completion is empty"
    echo "$model: The capital of France is$answer"
}

check_kernels() {
    [[ $(uname -m) == x86_64 ]] || return 0
    local library
    library=$(pod exec server lightwell build-kernels) || fail "the image has no compiled kernels"
    [[ $library == */prebuilt/* ]] || fail "the kernels are not the prebuilt ones of the image: $library"
    echo "kernels: $library"
}

# With torch for CUDA, Triton must be able to compile its C module as the image's user, and load it from its cache in the
# volume, since a tmpfs is mounted noexec; otherwise there is no compiler.
check_compiler() {
    if pod exec server python3 -c 'import triton' 2>/dev/null; then
        pod exec --interactive server python3 - <deploy/check_triton.py \
            || fail "Triton cannot compile its C module in the image"
    elif pod exec server sh -c 'command -v cc gcc clang'; then
        fail "the image has a compiler, but no Triton that needs it"
    fi
}

check_nothing_fetched() {
    local files
    # The record of the running server, by which its own clients in the container find it, is not fetched.
    files=$(find "$(pod volume inspect --format '{{.Mountpoint}}' cache)" -type f -not -path "*/servers/*")
    [[ -z $files ]] || fail "model and kernels are in the image, but the volume contains: $files"
}

# Kill the engine: the server exits, and the restart policy starts it again.
check_crash() {
    kill -KILL "$(processes 'engine\.process')"
    wait_until "restart after a crash" restarted
    wait_until "ready after a crash" is_healthy
}
restarted() { [[ $(pod inspect --format '{{.RestartCount}}' server) -gt 0 ]]; }

# Prometheus with the files of deploy/prometheus, but another address, key file and scrape interval.

check_prometheus() {
    local folder=$work/scrape url=http://127.0.0.1:$prometheus_port
    rm -rf "$folder"
    cp -r deploy/prometheus "$folder"
    echo -n "$KEY" >"$folder/key"
    sed -i "s|lightwell:8000|127.0.0.1:$port|; s|/run/secrets/lightwell_api_key|$folder/key|; s|15s|1s|" \
        "$folder/prometheus.yml"
    promtool check config --lint-fatal "$folder/prometheus.yml"
    prometheus --config.file "$folder/prometheus.yml" --storage.tsdb.path "$folder/data" \
        --web.listen-address "127.0.0.1:$prometheus_port" >"$work/prometheus.log" 2>&1 &
    prometheus_pid=$!
    wait_until "Prometheus scrapes" finds "$url" 'min_over_time(up{job="lightwell"}[1m]) == 1'
    wait_until "Prometheus has a rate" finds "$url" 'rate(lightwell_generation_tokens_total[1m]) >= 0'
    curl --fail --silent "$url/api/v1/label/__name__/values" | python3 -c '
import json, sys
names = [name for name in json.load(sys.stdin)["data"] if name.startswith("lightwell_")]
assert len(names) > 50, names
print(f"{len(names)} series names start with lightwell_")'
    python3 deploy/check_dashboard.py "$url"
    kill "$prometheus_pid"
    wait "$prometheus_pid" || fail "Prometheus exited with an error"
    prometheus_pid=""
}
finds() {
    curl --fail --silent --get --data-urlencode "query=$2" "$1/api/v1/query" | grep -q '"value"'
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

install_tools
mount_cgroups

say "docker-compose.yml"
LIGHTWELL_API_KEY=$KEY docker-compose config --quiet
if env --unset=LIGHTWELL_API_KEY docker-compose config --quiet 2>"$work/compose.log"; then
    fail "docker-compose.yml can be used without a key"
fi
cat "$work/compose.log"

choose_base_image
say "build"
build_image
port=$(free_port)
prometheus_port=$(free_port)

say "start without a key"
status=0
run --rm --network none "$IMAGE" || status=$?
[[ $status == 2 ]] || fail "expected exit code 2, got $status"

say "start as in docker-compose.yml"
run_server --init --restart unless-stopped
if is_healthy >/dev/null 2>&1; then
    fail "healthy before it is ready"
fi
began=$SECONDS
wait_until "ready" is_healthy
echo "healthy after $((SECONDS - began)) s"
check_confinement
check_api
check_kernels
check_nothing_fetched
check_compiler

say "Prometheus"
check_prometheus

say "crash of the engine"
check_crash
check_api
stop_server

say "start without an init process, and with loopback only"
run --detach --network none --env LIGHTWELL_API_KEY="$KEY" "$IMAGE" >/dev/null
wait_until "ready" is_healthy
stop_server

say "All checks passed."
