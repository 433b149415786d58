use super::*;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// What happens, in order: to the memory, and between the kernel and its readers.
#[derive(Debug, Clone, Copy)]
enum Step {
    Store(usize, u64),
    /// `read(2)` returned this request in a landing: the kernel's copy is one step, because nobody is killed in it.
    Taken(usize, TakenRead),
    Answered(u64),
}

/// Memory whose every change is written down.
#[derive(Clone, Default)]
struct Recorded {
    words: Rc<RefCell<BTreeMap<usize, u64>>>,
    steps: Rc<RefCell<Vec<Step>>>,
}

impl Recorded {
    fn put(&self, index: usize, value: u64) {
        self.words.borrow_mut().insert(index, value);
    }

    /// Takes a request as the kernel hands it out.
    fn take(&self, landing: usize, read: TakenRead) {
        self.steps.borrow_mut().push(Step::Taken(landing, read));
        self.land(landing, &read);
    }

    fn land(&self, landing: usize, read: &TakenRead) {
        for (index, word) in bytes(read).chunks(8).enumerate() {
            self.put(landing_at(landing) + index, u64::from_ne_bytes(word.try_into().unwrap()));
        }
    }
}

impl Words for Recorded {
    fn load(&self, index: usize) -> u64 {
        self.words.borrow().get(&index).copied().unwrap_or(0)
    }
    fn store(&self, index: usize, value: u64) {
        self.steps.borrow_mut().push(Step::Store(index, value));
        self.put(index, value);
    }
    fn copy(&self, first: usize, bytes: usize, into: &mut Vec<u8>) {
        let end = into.len() + bytes;
        (first..first + bytes.div_ceil(8)).for_each(|index| into.extend(self.load(index).to_ne_bytes()));
        into.truncate(end);
    }
}

/// A READ request as the kernel writes it.
fn bytes(read: &TakenRead) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(80u32.to_ne_bytes()); // len
    out.extend(15u32.to_ne_bytes()); // FUSE_READ
    out.extend(read.unique.to_ne_bytes());
    out.extend(read.node.to_ne_bytes());
    out.extend([0; 8]); // uid, gid
    out.extend(read.pid.to_ne_bytes());
    out.extend([0; 4]);
    out.extend([0; 8]); // file handle
    out.extend(read.offset.to_ne_bytes());
    out.extend(read.size.to_ne_bytes());
    out.resize(80, 0);
    out
}

fn read(number: u64) -> TakenRead {
    let pid = u32::try_from(number).unwrap() + 100;
    TakenRead { unique: number * 2, node: number << 32 | 7, pid, offset: number * 4096, size: 131_072 }
}

/// Everything the next process finds, each once.
fn found(memory: Recorded) -> BTreeSet<u64> {
    let journal = Journal::adopt(memory).unwrap();
    let left = journal.left();
    let mut all: Vec<TakenRead> = left.reads.iter().map(|(_, read, _)| *read).collect();
    for landing in left.landings {
        let mut request = Vec::new();
        journal.landed(landing, &mut request);
        all.extend(TakenRead::of(&Request::parse(&request).unwrap()));
    }
    // Whole, whichever of them it is.
    assert!(all.iter().all(|taken| *taken == read(taken.unique / 2)), "{all:?}");
    all.iter().map(|read| read.unique).collect()
}

/// What threads do, one at a time.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// A thread takes a request and answers it at once.
    AtOnce(usize),
    /// A thread takes a request that has to wait.
    Wait(usize),
    /// The oldest, or the youngest, of those that wait is answered.
    Answer(bool),
    Interrupt,
}

fn run(acts: &[Act]) -> Vec<Step> {
    let memory = Recorded::default();
    let journal = Journal::adopt(memory.clone()).unwrap();
    let mut waiting: Vec<(u64, Slot)> = Vec::new();
    for (act, number) in acts.iter().zip(1..) {
        let read = read(number);
        match *act {
            Act::AtOnce(landing) => {
                memory.take(landing, read);
                memory.steps.borrow_mut().push(Step::Answered(read.unique));
                journal.empty(landing);
            }
            Act::Wait(landing) => {
                memory.take(landing, read);
                let mut request = Vec::new();
                journal.landed(landing, &mut request);
                let taken = TakenRead::of(&Request::parse(&request).unwrap()).unwrap();
                assert_eq!(taken, read);
                waiting.push((read.unique, journal.keep(&taken).unwrap()));
                journal.empty(landing);
            }
            Act::Answer(oldest) if !waiting.is_empty() => {
                let (unique, slot) = if oldest { waiting.remove(0) } else { waiting.pop().unwrap() };
                memory.steps.borrow_mut().push(Step::Answered(unique));
                journal.settle(slot);
            }
            Act::Interrupt if !waiting.is_empty() => journal.interrupted(waiting[0].1),
            Act::Answer(_) | Act::Interrupt => {}
        }
    }
    memory.steps.take()
}

/// Kills the process after each step: what the kernel waits for is found, and nothing that never was.
fn killed_everywhere(steps: &[Step]) {
    let (mut outstanding, mut ever) = (BTreeSet::new(), BTreeSet::new());
    let memory = Recorded::default();
    for step in steps {
        match step {
            Step::Store(index, value) => memory.put(*index, *value),
            Step::Taken(landing, read) => {
                outstanding.insert(read.unique);
                ever.insert(read.unique);
                memory.land(*landing, read);
            }
            Step::Answered(unique) => {
                outstanding.remove(unique);
            }
        }
        let copy = Recorded::default();
        *copy.words.borrow_mut() = memory.words.borrow().clone();
        let found = found(copy);
        assert!(found.is_superset(&outstanding), "after {step:?}: {found:?} lacks some of {outstanding:?}");
        assert!(found.is_subset(&ever), "after {step:?}: {found:?}");
        // Harmless, but never more than one per thread and answer.
        assert!(found.len() <= outstanding.len() + 1, "after {step:?}: {found:?} for {outstanding:?}");
    }
}

proptest! {
    #[test]
    fn proptest_wherever_the_process_is_killed_the_next_one_finds_what_is_not_answered(
        acts in prop::collection::vec(
            prop_oneof![
                (0..4usize).prop_map(Act::AtOnce),
                (0..4usize).prop_map(Act::Wait),
                any::<bool>().prop_map(Act::Answer),
                Just(Act::Interrupt),
            ],
            1..60,
        )
    ) {
        killed_everywhere(&run(&acts));
    }

    #[test]
    fn proptest_any_memory_can_be_read(words in prop::collection::btree_map(0..RECORDS_AT + 4096, any::<u64>(), 0..200), used in 0..100_000u64) {
        let memory = Recorded::default();
        *memory.words.borrow_mut() = words;
        memory.put(VERSION_AT, MAGIC | VERSION);
        memory.put(USED_AT, used.min(2_000));
        let journal = Journal::adopt(memory).unwrap();
        let left = journal.left();
        let mut request = Vec::new();
        for landing in left.landings {
            journal.landed(landing, &mut request);
            let _ = Request::parse(&request);
        }
    }
}

#[test]
fn an_interrupted_read_is_known_as_such_and_a_record_that_is_free_cannot_be_interrupted() {
    let memory = Recorded::default();
    let journal = Journal::adopt(memory.clone()).unwrap();
    assert!(!journal.inherited());
    let slots = [1, 2, 3].map(|number| journal.keep(&read(number)).unwrap());
    journal.interrupted(slots[1]);
    journal.settle(slots[2]);
    journal.interrupted(slots[2]);
    let next = Journal::adopt(memory).unwrap();
    assert!(next.inherited());
    let expected = vec![(slots[0], read(1), Wanted::Still), (slots[1], read(2), Wanted::Perhaps)];
    assert_eq!(next.left(), Left { reads: expected, landings: vec![] });
    // The free one is used again, before any that was never used.
    assert_eq!(next.keep(&read(9)), Some(slots[2]));
    assert_eq!(next.keep(&read(10)), Some(Slot(3)));
}

#[test]
fn there_are_as_many_records_as_requests_in_the_background_and_then_no_more() {
    let journal = Journal::open(&crate::sys::shared::create("test", SIZE).unwrap()).unwrap();
    let slots: Vec<Slot> = (1..).map_while(|number| journal.keep(&read(number))).collect();
    assert_eq!(slots.len(), RECORDS);
    journal.settle(slots[17]);
    assert_eq!((journal.keep(&read(1)), journal.keep(&read(2))), (Some(slots[17]), None));
}

#[test]
fn a_journal_of_another_version_or_size_is_refused_and_left_as_it_is() {
    let memory = Recorded::default();
    memory.put(VERSION_AT, MAGIC | 2);
    let error = Journal::adopt(memory.clone()).err().unwrap();
    assert_eq!(error.to_string(), "the journal of requests is of version 2, and this build knows version 1");
    assert_eq!(memory.load(VERSION_AT), MAGIC | 2);
    assert!(memory.steps.borrow().is_empty());
    let short = crate::sys::shared::create("test", SIZE - 4096).unwrap();
    assert!(matches!(Journal::open(&short), Err(JournalError::Size { .. })));
}
