//! The object as it comes out of the compiler, without a kernel to load it into: maps, programs, licence, the running kernel's types, size.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends so")]

use std::collections::BTreeSet;

use aya_obj::btf::{Btf, BtfFeatures, BtfKind};
use aya_obj::generated::bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH};
use aya_obj::{Function, Object, ProgramSection};
use blxrep_ebpf::{BIO_PROBES, OBJECT, REQUEST_PROBES, constant, map, meta, state};

/// include/uapi/linux/bpf.h
const BPF_F_RDONLY_PROG: u32 = 1 << 7;
const BPF_F_MMAPABLE: u32 = 1 << 10;
/// A call of a function that there is not: what a relocation leaves where the kernel lacks a type or field (as libbpf does).
const POISON: (u8, i16, i32) = (0x85, 0, 0x0bad_2310);
/// What was counted when the programs were changed last, and with which compiler.
const RECORDED: &str = include_str!("../instructions.txt");

fn object() -> Object {
    Object::parse(OBJECT).unwrap()
}

#[test]
fn maps_are_of_their_type_and_size() {
    let object = object();
    let shared = |value: u32, entries| (BPF_MAP_TYPE_ARRAY as u32, BPF_F_MMAPABLE, 4, value, entries);
    // Those with one entry are made as large as the disk, or the machine, needs.
    let expected = [
        (map::LIVE, shared(8, 1)),
        (map::COARSE, shared(8, 1)),
        (map::PENDING, shared(8, 1)),
        (map::META, shared(8, meta::ENTRIES as u32)),
        (map::STATE, shared(8, state::ENTRIES as u32)),
        (map::COUNTS, shared(8 * blxrep_ebpf::COUNT_WORDS as u32, 1)),
        (map::INFLIGHT, (BPF_MAP_TYPE_HASH as u32, 0, 8, 16, 1)),
    ];
    assert_eq!(expected.map(|(name, _)| name), map::ALL);
    for (name, expected) in expected {
        let map = &object.maps[name];
        let found = (map.map_type(), map.map_flags(), map.key_size(), map.value_size(), map.max_entries());
        assert_eq!(found, expected, "{name}");
    }
    let others: Vec<_> = object.maps.keys().filter(|name| !map::ALL.contains(&name.as_str())).collect();
    assert_eq!(others, [".rodata"], "the constants, and nothing else");
    assert_eq!(object.maps[".rodata"].map_flags() & !BPF_F_RDONLY_PROG, 0);
    let symbols = [constant::MAJOR, constant::MINOR, constant::BLOCK_SHIFT, constant::BLOCKS];
    assert_eq!(
        object.maps[".rodata"].data().len(),
        (symbols.len() - 1) * 4 + 4 + 8,
        "three u32, padding, a u64"
    );
}

#[test]
fn programs_are_those_of_the_probes_and_may_use_what_is_gpl_only() {
    let object = object();
    let names: BTreeSet<_> = object.programs.keys().map(String::as_str).collect();
    let probes = REQUEST_PROBES.iter().chain(BIO_PROBES);
    assert_eq!(names, probes.flat_map(|probe| probe.copies).collect());
    for (name, program) in &object.programs {
        assert!(matches!(program.section, ProgramSection::BtfTracePoint), "{name}: {:?}", program.section);
    }
    assert_eq!(object.license.to_str().unwrap(), "Dual MIT/GPL");
}

#[test]
fn the_running_kernel_has_every_type_and_field() {
    let kernel = Btf::from_sys_fs().unwrap();
    let mut object = object();
    assert!(object.has_btf_relocations());
    let before = instructions(&object);
    object.fixup_and_sanitize_btf(&BtfFeatures::default()).unwrap();
    object.relocate_btf(&kernel).unwrap();
    let after = instructions(&object);
    assert!(!after.contains(&POISON), "the running kernel lacks a field");
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    assert!(moved > 0, "no field lies elsewhere than in our own short structures");
    // Every tracepoint is there.
    for probe in REQUEST_PROBES.iter().chain(BIO_PROBES) {
        let name = format!("btf_trace_{}", probe.tracepoint);
        kernel.id_by_type_name_kind(&name, BtfKind::Typedef).unwrap();
    }
    let text = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&text).unwrap();
}

fn instructions(object: &Object) -> Vec<(u8, i16, i32)> {
    object
        .functions
        .values()
        .flat_map(|function| &function.instructions)
        .map(|it| (it.code, it.off, it.imm))
        .collect()
}

#[test]
fn programs_are_as_long_as_recorded() {
    let mut functions: Vec<Function> = object().functions.into_values().collect();
    functions.sort_by(|a, b| a.name.cmp(&b.name));
    let found: Vec<_> = functions.iter().map(|it| (it.name.as_str(), it.instructions.len())).collect();
    let mut lines = RECORDED.lines().filter(|line| !line.starts_with('#'));
    let recorded_compiler = lines.next().unwrap();
    let recorded: Vec<_> = lines
        .filter_map(|line| line.split_once(' '))
        .map(|(name, count)| (name, count.parse::<usize>().unwrap()))
        .collect();
    let text = String::from_utf8_lossy(OBJECT);
    let version = text.split("clang version ").nth(1).unwrap_or_default();
    let compiler = format!("clang {}", version.chars().take_while(char::is_ascii_digit).collect::<String>());
    // Another compiler makes other code, but not much longer: every instruction is paid for with every write.
    let margin = |count: usize| if compiler == recorded_compiler { 0 } else { count / 5 };
    let fits = |(now, was): (&(&str, usize), &(&str, usize))| {
        now.0 == was.0 && now.1.abs_diff(was.1) <= margin(was.1)
    };
    let new: String = found.iter().map(|(name, count)| format!("{name} {count}\n")).collect();
    assert!(
        found.len() == recorded.len() && found.iter().zip(&recorded).all(fits),
        "not what ebpf/instructions.txt says; if it is meant to be so, write there:\n{compiler}\n{new}"
    );
}
