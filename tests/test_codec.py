"""The codec: exact on everything, golden on old bytes, harmless on bad ones."""
import base64
import hashlib
import random
import time
import tracemalloc

import numpy as np
import pytest

from golf.codec import (CODE_BLOCK, MOST_KEYS, CodeModel, bytes_of_counts,
                        counts_of_bytes, decode_codes, encode_codes,
                        expected_code_bytes, fit_codes, ideal_bits,
                        merge_tables, pack_group, pack_model, table_shares,
                        unpack_group, unpack_model)

# `encode_codes` of `golden_codes`, made once: not to be made anew.
GOLDEN = (
    'Ks5jW00DmhA^-pYD77#BAn?rq0Du53(*OVf000310RI31{{sR54y4Iaa0S_ovJxnfbQb{t'
    '000JB)A0ZR04TLD{a|DQJqG{;3Ih%R6c`>98XXiF9TgiK78xBB7#<TE79SiP9vuJx2LT=&'
    '7!n8)7#tn|0RjR70|W&CHxjo10t_4w4g&r5?cwzR0TBxf{Py|t`2Yh22@4Ac2m=EG{r&y>'
    '_xJJq_x=C_{RRx~9SPbo1I#%D!#w}RH~h^o_t_i#=?nP%00RC8`3&?C?-=MF;v(K7-6Y%~'
    ';2h)-@CW$@`Tzg`0V5zlNmT~`;E%unEPw?Cd0_w!U;rP$0AK(%fEWbgg%w?sm_`vp6HG+&'
    '<S?)Ry4Q_PELlUqRwf020+<I%0?DSMwAf7tC~m-}mXJ{P3wmUZPs99^Dd}k;U{vN{OeeW7'
    'cQI=qP?gMBR%wUMgCe7wg9blyIf2{B?rUqZ(Ua4ks=S_{`g}3!*K<>fF+e@TqjT3PYaW^f'
    '*Wm89XB|r6FVywHGGfd0n26X7ZmU!<Hb1lyp;<*VhSQVc<G&!wwf;`!e@}VlqJD>R1$3Em'
    '{pI*Ud`h3Jv{o~PW?EqHE&?N{Ya3z}-zp!qv$QYa()5a8y5ytXd;6Wt$Nr&>Y-N4gz;wKj'
    'Znyd*iyKV;CvkINf%$5BwIrG@a6YOE-O_g>{{b38&?<Na6&x}8(;wA9r?tiT%#1%N=2mS)'
    '(|1Nfm(tnTJWDgX51VP$jMcdKT6ZTT0wzU{N~WSUB~0tGg8%8%sm~nuZB9ZZ*AxqPDAPF$'
    '&WT=HvL2$Q^gfr*<L`vFJYa3N!{Zn2D^^0`gz-w+e3)cR28vwEQpT&9C&5(q3L(dpkCt`p'
    'KFGLUC+-t8CG}|ml+lG2Un(}AiO&(??bBXmadppvyChiL*MWiIgtnjZ=3iXADZHv`@>o+E'
    'NNJFmoZ%i45a3Xs0mVKohC$N*VU_W~-*{V`Ew*KHuvHHrqk}YExV@km@D&04+y()HKO(%I'
    'r`Lk1bp(mGf0n3&QB=BGI*-eCHm@w%xq`g#i#)RTo&)G}J9_{-J6b(8x^+U^dO;@w$bK{r'
    '6GfePiwz`|>`l@6M5oi$Gk_J+54W2peqzB7rGc2*SuvJ4Fg)SW7@ICeybb{Rcc)ntKT2@N'
    '+(?ajFT!xb=XWEG$3MB3{U%Jt>`}6+#Gtqco-H=)n>;t3Wer!$Fi!Kh3ml_kuhvn=eOCZP'
    '=$CqESg>M~;Au3RzpEjloT7%@kXgAPP6<i2#W`I18Zu2P8m0sFp2*&9U2vRVbEO>tMrmkk'
    '6B~KhfkeK>H9!oNwBntoLX&#n!x%-3=G^3lm%4Sh@ZkZ$ig_!6{5zDTNzR}^L%g{QE_K`1'
    'tZCWc`3d-Ii*OoGWvO{)bzA3W5Bryn@%CtG34UcgZB1^>OgNP(Q+e8Mw(7Vqkwk!Uv}(T0'
    'eQ1GB=z=Eh&HJE~sF-H!F(7PF64c@9pQPK^W6In~0pOdx8hqy`nMtW2aJ0HFtLr+!dFZt@'
    'SRl7!<9t(;*umhfSjl{X4Cm?~OY@`UhC6iZKi@I9Rt9R>K0o-;g^<^{b@U*@Q-Llf)McF~'
    'Sr5%2y4dlR%}!`G{g~?M@Smxl&z%9<<mO$qh3Rew9420NsZe^%WtkkrXhNX97fNGd5wCKU'
    'c}Ek!Ox)QS+yQ<%QbEv21SDgA7(=W(oVsx;_L`C1E>L~s(}loR(%{ooyG>m4`HHtUg=mGb'
    'Wq5@VJcmf+!c1N!Evy<e2sz2>dTSo)KPOUDVUKk6Z>KVc-gAvbf8VXm{N|HWlA-Bpa8LUj'
    '+_jTjC!E%P9->bHWIyvykA^V}K3b&bK-V%?#;>vxpx=BFnSTQTgasvtQ@_#!$S?O^!yE3N'
    'mno+|hQnA8M8S}%LD1Y(Fg52950M?yjjBKlbWe%^0J-O)8lmG7t#LQ>{-O05c`n-0Q`r$)'
    'YOA&4a3#sWn?@yhYwRXoU}7aegSNnrrqnq24^`hIFJB>3O)TGa*b+(~p7_?W(kMRv^opb$'
    'q+XM1ArceVy$8gAQ-l<;F1DEq5z3mtBWqV&=m9r6)1%-$V!>$b13v3KxO$HJ;BP#&AX2&&'
    'Z1Ptl0<)TpISJ9kd(K~F<$-YkWTC}DbrZ1rMlF$cY#|722rLrl7ib_zoF8}N5&KO#naC#U'
    '7jL_HQ?0p(h3BK5(n<j8m=E{-B4-ckOl1uJ%I9e)ja$BPH-x0e<|+<MATeO%yYQ!R`#15@'
    '6pomjQYx$z4@otTVxy|NkMR-t-Yv^Xvq_S{6`|+_V6m@vk%%2;1<P$e1H{?BbyMQLLy?Mg'
    'i5$d%RKkzbGuh4*p`Z*qR?u>Q2kgKQ8m3|@nICk`!4Gg-U;alJ5pd?IC<7f18E?~l13*CI'
    'Uiuyg`MfZ7tIHE3U&cg1W{TI6yCOS}O+i&2etcS}Uk_FI`aeMU*=G?T0E~D5000'
)
GOLDEN_SHA256 = 'a40ef1c56d64c4b85581a73d62f7952a5f0f90b6ab10bef65c66d2520212258a'


def golden_codes():
    "Three matrices by whole numbers only: loud columns, a table, a row."
    n = np.arange(64*48, dtype=np.int64)
    noise = sum((n*k % m % 7) - 3 for k, m in
                ((7919, 10007), (104729, 9973), (1299709, 9949)))
    first = noise.reshape(64, 48)*(1 + np.arange(48) % 3)//2
    base = noise[:96*4].reshape(96, 4)
    table = np.concatenate([base*5, base[:, ::-1]*5 + noise[:384].reshape(
        96, 4)//3], 1)
    return [m.astype(np.int8) for m in (first, table, n[None, :9] - 4)]


def shapes_of(mats): return [m.shape for m in mats]


def digest(mats):
    return hashlib.sha256(b''.join(m.tobytes() for m in mats)).hexdigest()


def same(a, b):
    return len(a) == len(b) and all(
        x.dtype == y.dtype == np.int8 and np.array_equal(x, y)
        for x, y in zip(a, b))


def draw(rng, rows, cols):
    "A random matrix of one of several kinds."
    kind = rng.integers(6)
    if kind == 0: return rng.integers(-128, 128, (rows, cols)).astype(np.int8)
    if kind == 1: return np.full((rows, cols), rng.integers(-128, 128),
                                 np.int8)
    if kind == 2: return np.where(rng.random((rows, cols)) < .03,
                                  rng.choice([-128, 127]), 0).astype(np.int8)
    loud = np.exp(rng.normal(0, kind - 3, (rows, 1))
                  + rng.normal(0, 1, (1, cols)))
    x = rng.standard_normal((rows, cols))*loud*rng.choice([.3, 3, 40])
    if kind == 5: x = x @ rng.standard_normal((cols, cols))
    return np.rint(x).clip(-128, 127).astype(np.int8)


def test_golden_bytes_decode_to_the_same_codes():
    blob = base64.b85decode(GOLDEN)
    mats = golden_codes()
    back = decode_codes(blob, shapes_of(mats))
    assert digest(back) == GOLDEN_SHA256
    assert same(back, mats)


@pytest.mark.parametrize('seed', range(12))
def test_round_trip_of_random_groups(seed):
    rng = np.random.default_rng(seed)
    for _ in range(6):
        mats = [draw(rng, *rng.choice([0, 1, 2, 3, 17, 64, 150], 2))
                for _ in range(rng.integers(0, 5))]
        blob = encode_codes(mats)
        assert same(decode_codes(blob, shapes_of(mats)), mats)
        assert encode_codes([m.copy() for m in mats]) == blob
        assert abs(expected_code_bytes(mats) - len(blob)) < 32


def test_extremes():
    every = np.arange(-128, 128).astype(np.int8)
    low, high = every[:1, None], every[-1:, None]
    for mats in ([], [low], [high], [low, high], [every[None]],
                 [every[:, None]], [np.zeros((500, 3), np.int8)],
                 [np.empty((0, 5), np.int8), np.empty((5, 0), np.int8)],
                 [np.empty((0, 0), np.int8), high]):
        blob = encode_codes(mats)
        assert same(decode_codes(blob, shapes_of(mats)), mats)
    assert len(encode_codes([np.full((2000, 2000), -128, np.int8)])) < 60


def test_views_and_other_layouts():
    rng = np.random.default_rng(1)
    m = rng.integers(-9, 9, (60, 40)).astype(np.int8)
    for view in (m.T, m[::2, ::-1], np.asfortranarray(m)):
        blob = encode_codes([view])
        assert same(decode_codes(blob, [view.shape]), [view])


def test_blocks_are_cut_in_both_directions():
    rng = np.random.default_rng(2)
    wide = rng.integers(-3, 4, (2, CODE_BLOCK + 5)).astype(np.int8)
    tall = rng.integers(-3, 4, (CODE_BLOCK + 5, 1)).astype(np.int8)
    for mats in ([wide], [tall], [wide, tall]):
        assert same(decode_codes(encode_codes(mats), shapes_of(mats)), mats)


def test_counts_are_small_floats():
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 2**rng.integers(1, 40, (50, 200)))
    back = counts_of_bytes(bytes_of_counts(counts))
    assert ((counts == 0) == (back == 0)).all()
    rough = np.minimum(1, (31 << 14)/counts.max())
    big = counts*rough > 40
    assert np.abs(back[big]/(counts[big]*rough) - 1).max() < .06


def test_shares_sum_and_are_whole():
    rng = np.random.default_rng(4)
    for n in (2, 3, 31, 256):
        packed = rng.integers(0, 256, (20, n), np.uint8)
        packed[:, 0] |= 1
        shares = table_shares(packed)
        assert shares.dtype == np.int64 and shares.min() >= 1
        assert (shares.sum(1) == 2**24).all()
    with pytest.raises(ValueError, match='empty'):
        table_shares(np.zeros((1, 5), np.uint8))


def test_merging_never_costs_more():
    "Nor more than one table for all; and no code is lost."
    rng = np.random.default_rng(5)
    for _ in range(10):
        counts = rng.poisson(rng.gamma(.5, 30, (6, 256))*(rng.random(
            (6, 1)) < .8))
        cost = lambda c: float(ideal_bits(c)) + 5*np.count_nonzero(c)
        which, tables = merge_tables(counts)
        for t, table in enumerate(tables):
            assert np.array_equal(table, counts[which == t].sum(0))
        greedy = sum(map(cost, tables))
        assert greedy <= sum(map(cost, counts)) + 1e-6
        assert greedy <= cost(counts.sum(0)) + 1e-6


@pytest.mark.parametrize('seed', range(4))
def test_close_to_own_cross_entropy_and_below_the_histogram(seed):
    rng = np.random.default_rng(seed)
    loud = np.exp(.4*rng.standard_normal((1, 300)))
    mats = [np.rint(3*loud*rng.standard_normal((400, 300))).clip(
        -16, 15).astype(np.int8) for _ in range(2)]
    known, counts, _ = fit_codes(mats)
    bits = (counts*(24 - np.log2(table_shares(known.tables)))).sum()
    words = len(pack_group(mats)) - len(pack_model(known))
    assert bits/8 <= words <= bits/8*1.0005 + 8
    plain = ideal_bits(sum(np.bincount(m.ravel().astype(int) + 128,
                                       minlength=256) for m in mats))
    assert len(encode_codes(mats)) < .985*plain/8


def test_near_the_law_itself():
    "Codes of known laws cost at most 0.5 % more than by those laws."
    rng = np.random.default_rng(6)
    scale = np.array([1., 2., 4.]).repeat(200)
    p = [np.exp(-.5*(np.arange(-20, 21)/s)**2) for s in (1, 2, 4)]
    p = [x/x.sum() for x in p]
    codes = np.stack([rng.choice(41, 2000, p=p[int(np.log2(s))]) - 20
                      for s in scale], 1).astype(np.int8)
    ideal = sum(-np.log2(p[i])[codes[:, i*200:i*200 + 200] + 20].sum()
                for i in range(3))/8
    assert len(encode_codes([codes])) < 1.005*ideal


def test_prediction_is_found_and_undone():
    rng = np.random.default_rng(7)
    x = rng.standard_normal((1500, 6)) @ rng.standard_normal((6, 40))
    x += .3*rng.standard_normal(x.shape)
    m = np.rint(x/x.std()*40).clip(-128, 127).astype(np.int8)
    blob = encode_codes([m])
    assert blob[0] == 128                    # the first matrix is predicted
    assert len(blob) < .9*len(pack_group([m]))
    assert same(decode_codes(blob, [m.shape]), [m])
    assert same(unpack_group(pack_group([m]), [m.shape]), [m])


def test_expected_bytes_of_a_sample():
    rng = np.random.default_rng(8)
    loud = np.exp(.3*rng.standard_normal((1, 256)))
    m = np.rint(3*loud*rng.standard_normal((4096, 256))).clip(
        -16, 15).astype(np.int8)
    part = expected_code_bytes([m[::4]], grow=4)
    assert abs(part/len(encode_codes([m])) - 1) < .005


def attempt(blob, shapes):
    "Codes of the declared shapes, or a ValueError of one line."
    try: back = decode_codes(blob, shapes)
    except ValueError as error:
        assert '\n' not in str(error) and str(error)
        return None
    assert [m.shape for m in back] == list(shapes)
    assert all(m.dtype == np.int8 for m in back)
    return back


def mutants(blob, rng):
    "Bytes changed, cut, added, repeated, exchanged; without end."
    while True:
        bad, at = bytearray(blob), rng.randrange(len(blob))
        kind = rng.randrange(7)
        if kind == 0: bad[at] ^= 1 << rng.randrange(8)
        if kind == 1: bad[at] = rng.choice((0, 1, 127, 128, 255))
        if kind == 2: del bad[at:]
        if kind == 3: del bad[at:at + rng.randrange(1, 9)]
        if kind == 4: bad[at:at] = rng.randbytes(rng.randrange(1, 9))
        if kind == 5: bad = bad[:at] + bad[:rng.randrange(len(blob))]
        if kind == 6: bad[:24] = rng.randbytes(24)
        yield bytes(bad)


def test_three_thousand_mutants_do_no_harm():
    mats = golden_codes()
    blob, shapes = encode_codes(mats), shapes_of(mats)
    wrong, source = 0, mutants(blob, random.Random(0))
    for _ in range(3000):
        back = attempt(next(source), shapes)
        wrong += back is not None and not same(back, mats)
    assert wrong < 1500                     # the others were refused


def test_every_flip_of_the_front():
    "Heads, flags and frames, where sizes are; each bit of them."
    mats = golden_codes()
    blob, shapes = encode_codes(mats), shapes_of(mats)
    for i in range(min(len(blob), 260)*8):
        bad = bytearray(blob)
        bad[i//8] ^= 1 << i % 8
        attempt(bytes(bad), shapes)


def test_noise_and_wrong_shapes():
    rng, mats = random.Random(1), golden_codes()
    blob, shapes = encode_codes(mats), shapes_of(mats)
    for n in range(200):
        attempt(rng.randbytes(n), shapes)
    for other in ([(1, 1)], shapes[::-1], shapes + [(0, 3)], shapes*2,
                  [(s[1], s[0]) for s in shapes], []):
        if [s for s in other if s[0]*s[1]] != shapes:
            attempt(blob, other)
    for extra in (b'\0', b'\0'*4, b'\1'*4, b'x'*400):
        assert attempt(blob + extra, shapes) is None


def test_a_model_that_lies_is_refused():
    known, _, _ = fit_codes(golden_codes()[:1])
    shapes, table = [(64, 48)], np.ones((2, 3), np.uint8)
    lies = [known._replace(which=np.full(MOST_KEYS, 9, np.uint8),
                           tables=table),
            known._replace(low=127), known._replace(low=-128 + 256 - 129,
                                                    tables=table[:, :2]),
            known._replace(row_keys=[known.row_keys[0][:-1]]),
            known._replace(tables=np.zeros((0, 3), np.uint8))]
    for lie in lies:
        assert isinstance(lie, CodeModel)
        with pytest.raises(ValueError):
            unpack_model(pack_model(lie), shapes)


def test_memory_is_that_of_the_codes():
    "A small file that declares much gets what it declares and little more."
    shape = (4000, 4000)
    blob = encode_codes([np.zeros(shape, np.int8)])
    for bad in (blob, *(b for b, _ in zip(mutants(blob, random.Random(2)),
                                          range(12)))):
        tracemalloc.start()
        attempt(bad, [shape])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16e6 + 6e6


def test_speed():
    "33 million codes in 60 s and 10 s: 0.6 and 3.4 million a second."
    rng = np.random.default_rng(9)
    loud = np.exp(.3*rng.standard_normal((1, 512)))
    mats = [np.rint(3*loud*rng.standard_normal((1792, 512))).clip(
        -16, 15).astype(np.int8) for _ in range(2)]
    count = sum(m.size for m in mats)
    t0 = time.process_time(); blob = encode_codes(mats)
    t1 = time.process_time(); decode_codes(blob, shapes_of(mats))
    t2 = time.process_time()
    assert t1 - t0 < 60*count/33.6e6 and t2 - t1 < 10*count/33.6e6
