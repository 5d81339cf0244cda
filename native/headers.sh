#!/bin/sh
# Puts the headers that walker.hpp needs into FOLDER/include, from Debian's packages, and installs nothing.
#
#     sh headers.sh FOLDER
#
# Needs apt-get on Debian 12 or newer. Debian 12 has no package of ONNX Runtime, so the packages of Debian 13 are
# read there, from the mirror that this machine uses, with lists of their own: the machine's sources stay as they are.
# A header of C has no dependency, and a library of a later version serves an older header.
set -eu
folder=${1:?"name a folder: sh headers.sh FOLDER"}
suite=${SUITE:-trixie}
keys=/usr/share/keyrings/debian-archive-keyring.gpg

[ ! -e "$folder/include/onnxruntime/onnxruntime_c_api.h" ] || exit 0
own=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Release: $own" 'Component: main' | head -n 1)
[ -n "$mirror" ] || { echo "headers.sh: apt has no source of Debian's component main for $own" >&2; exit 1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial" "$scratch/parts" "$scratch/out"
echo "deb [signed-by=$keys] $mirror $suite main" >"$scratch/sources.list"
# As whoever calls it: apt's own user cannot write into the scratch folder.
for option in "Dir::Etc::SourceList=$scratch/sources.list" "Dir::Etc::SourceParts=$scratch/parts" \
    "Dir::State::Lists=$scratch/lists" "Dir::Cache=$scratch/cache" "APT::Sandbox::User=$(id -un)"; do
    set -- "$@" -o "$option"
done
shift # the folder
apt-get -qq "$@" update
(cd "$scratch" && apt-get -qq "$@" download libonnxruntime-dev nlohmann-json3-dev)
for package in "$scratch"/*.deb; do dpkg-deb -x "$package" "$scratch/out"; done

mkdir -p "$folder"
cp -R "$scratch/out/usr/include" "$folder/include.$$"
# Another call may have been faster; then its headers are kept.
mv -T "$folder/include.$$" "$folder/include" || { rm -rf "$folder/include.$$"; [ -d "$folder/include/nlohmann" ]; }
