//! The catalogue over a medium in memory: cut at every operation, and damaged in every place that is in use.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::{Database, ReadableDatabase, StorageBackend, TableDefinition};

use super::catalogue::open_checked;

const TABLE: TableDefinition<'_, &str, &str> = TableDefinition::new("xmactions");
const COMMITS: usize = 8;
const SECTOR: usize = 512;

/// What happens to writes that were not synced when the power fails.
#[derive(Debug, Clone, Copy)]
enum Loss {
    All,
    None,
    /// Sector by sector, by chance.
    Some(u64),
}

#[derive(Default)]
struct Disk {
    durable: Vec<u8>,
    content: Vec<u8>,
    /// Since the last sync: where, how long.
    written: Vec<(usize, usize)>,
    operations: u64,
    /// Behind this many operations the process is dead.
    dies_at: Option<u64>,
}

#[derive(Clone, Default)]
struct Medium(Arc<Mutex<Disk>>);

impl std::fmt::Debug for Medium {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Medium")
    }
}

impl Medium {
    fn of(content: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Disk { durable: content.clone(), content, ..Disk::default() })))
    }

    fn dying_at(operation: u64) -> Self {
        let medium = Self::default();
        medium.disk().dies_at = Some(operation);
        medium
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    /// One more operation that changes something, if the process lives.
    fn step(&self) -> io::Result<MutexGuard<'_, Disk>> {
        let mut disk = self.disk();
        if disk.dies_at.is_some_and(|last| disk.operations >= last) {
            return Err(io::Error::other("dead"));
        }
        disk.operations += 1;
        Ok(disk)
    }

    fn after_power_cut(&self, loss: Loss) -> Vec<u8> {
        let disk = self.disk();
        let mut seed = match loss {
            Loss::All => return disk.durable.clone(),
            Loss::None => return disk.content.clone(),
            Loss::Some(seed) => seed | 1,
        };
        let mut chance = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.is_multiple_of(2)
        };
        let mut image = disk.durable.clone();
        // The length is the file system's: it may be the old or the new one.
        if chance() || image.len() < disk.content.len() {
            image.resize(disk.content.len(), 0);
        }
        for (start, len) in &disk.written {
            for at in (*start..start + len).step_by(SECTOR) {
                let end = (at + SECTOR).min(start + len).min(image.len()).min(disk.content.len());
                if at < end && chance() {
                    image[at..end].copy_from_slice(&disk.content[at..end]);
                }
            }
        }
        image
    }
}

impl StorageBackend for Medium {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk().content.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.disk();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(disk.content.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        assert!(len < 1 << 30, "a damaged length is believed");
        self.step()?.content.resize(usize::try_from(len).map_err(io::Error::other)?, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.step()?;
        disk.durable = disk.content.clone();
        disk.written.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.step()?;
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let place = disk.content.get_mut(start..start + data.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        place.copy_from_slice(data);
        disk.written.push((start, data.len()));
        Ok(())
    }
}

fn open(medium: &Medium) -> Result<Database, redb::Error> {
    open_checked(|| Database::builder().create_with_backend(medium.clone()))
}

fn put(database: &Database, number: usize) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    let mut table = write.open_table(TABLE)?;
    table.insert(&*format!("agent/disk{number}/copy"), &*"x".repeat(700 * number))?;
    table.insert("last", &*number.to_string())?;
    drop(table);
    Ok(write.commit()?)
}

/// Which commits it holds; panics if one is half there.
fn held(database: &Database) -> Result<usize, redb::Error> {
    let read = database.begin_read()?;
    let table = read.open_table(TABLE)?;
    let last = table.get("last")?.map_or(0, |last| last.value().parse().unwrap());
    for number in 1..=COMMITS {
        let text = table.get(&*format!("agent/disk{number}/copy"))?.map(|text| text.value().len());
        assert_eq!(text, (number <= last).then_some(700 * number), "{number} of {last}");
    }
    Ok(last)
}

/// Commits until the medium dies; gives how many commits were acknowledged.
fn script(medium: &Medium) -> usize {
    let Ok(database) = open(medium) else { return 0 };
    let done = (1..=COMMITS).take_while(|number| put(&database, *number).is_ok()).count();
    drop(database);
    done
}

#[test]
fn cut_at_any_operation_it_opens_with_what_was_acknowledged_or_counts_as_damaged() {
    let whole = Medium::default();
    assert_eq!(script(&whole), COMMITS);
    let operations = whole.disk().operations;
    assert!(operations > 30, "{operations}");
    let (mut opened, mut damaged) = (0, 0);
    for last in 0..=operations {
        let medium = Medium::dying_at(last);
        let acknowledged = script(&medium);
        for loss in [Loss::All, Loss::None, Loss::Some(last * 2 + 7), Loss::Some(last * 31 + 1)] {
            let image = medium.after_power_cut(loss);
            let begun = !image.is_empty();
            match open(&Medium::of(image)) {
                Ok(database) => {
                    let held = held(&database).unwrap();
                    let fits = held == acknowledged || held == acknowledged + 1;
                    assert!(fits, "{held} of {acknowledged} commits, cut at {last}, {loss:?}");
                    put(&database, held + 1).unwrap();
                    opened += 1;
                }
                Err(error) => {
                    assert!(
                        begun && acknowledged == 0,
                        "{error}: cut at {last} behind {acknowledged}, {loss:?}"
                    );
                    damaged += 1;
                }
            }
        }
    }
    println!("{operations} operations: opened {opened} times, damaged {damaged} times");
}

/// None may be taken for anything else, and none may end the process or go on for ever.
#[test]
fn damage_anywhere_is_found_or_does_no_harm() {
    let medium = Medium::default();
    assert_eq!(script(&medium), COMMITS);
    let sound = medium.after_power_cut(Loss::None);
    let mut found = 0;
    let in_use = |at: &usize| sound[*at..(*at + 64).min(sound.len())].iter().any(|b| *b != 0);
    for at in (0..sound.len()).step_by(64).filter(in_use) {
        for (place, flip) in [(at, 0xff), (at + at % 61, 1), (at + 1, 0x80)] {
            let mut image = sound.clone();
            if let Some(byte) = image.get_mut(place) {
                *byte ^= flip;
            }
            found += usize::from(is_found(image));
        }
    }
    for len in (0..sound.len()).step_by(4096 + 17) {
        found += usize::from(is_found(sound[..len].to_vec()));
    }
    assert!(found > 100, "{found}");
}

/// Whether damage was found; if not, everything must be there.
fn is_found(image: Vec<u8>) -> bool {
    let begun = !image.is_empty();
    match open(&Medium::of(image)) {
        Err(_) => true,
        // A file of no bytes is a new one; redb may go back to the commit before.
        Ok(database) => {
            let held = held(&database).unwrap();
            assert!(!begun || held >= COMMITS - 1, "{held}");
            put(&database, held + 1).unwrap();
            false
        }
    }
}
