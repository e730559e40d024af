// glibc 2.34 moved libpthread, libdl and librt into libc and gave all their functions a new version. The CUDA
// runtime that is linked in calls these, and csrc/cuda/call.cpp two of them. Before 2.34 they are in those
// libraries, which torch needs, too.
#include "common/old_symbols.h"

SPARSE_ATTN_OLD(dlclose);
SPARSE_ATTN_OLD(dlerror);
#if defined(__x86_64__)
SPARSE_ATTN_OLD_VERSION(dlmopen, "GLIBC_2.3.4");
#else
SPARSE_ATTN_OLD(dlmopen);
#endif
SPARSE_ATTN_OLD(dlopen);
SPARSE_ATTN_OLD(dlsym);
SPARSE_ATTN_OLD(dlvsym);
SPARSE_ATTN_OLD(pthread_condattr_setpshared);
SPARSE_ATTN_OLD(pthread_create);
SPARSE_ATTN_OLD(pthread_detach);
SPARSE_ATTN_OLD(pthread_getspecific);
SPARSE_ATTN_OLD(pthread_join);
SPARSE_ATTN_OLD(pthread_key_create);
SPARSE_ATTN_OLD(pthread_key_delete);
SPARSE_ATTN_OLD(pthread_kill);
SPARSE_ATTN_OLD(pthread_mutex_trylock);
SPARSE_ATTN_OLD(pthread_mutexattr_destroy);
SPARSE_ATTN_OLD(pthread_mutexattr_init);
SPARSE_ATTN_OLD(pthread_mutexattr_setpshared);
SPARSE_ATTN_OLD(pthread_mutexattr_settype);
SPARSE_ATTN_OLD(pthread_once);
SPARSE_ATTN_OLD(pthread_rwlock_destroy);
SPARSE_ATTN_OLD(pthread_rwlock_init);
SPARSE_ATTN_OLD(pthread_rwlock_rdlock);
SPARSE_ATTN_OLD(pthread_rwlock_timedrdlock);
SPARSE_ATTN_OLD(pthread_rwlock_timedwrlock);
SPARSE_ATTN_OLD(pthread_rwlock_tryrdlock);
SPARSE_ATTN_OLD(pthread_rwlock_trywrlock);
SPARSE_ATTN_OLD(pthread_rwlock_unlock);
SPARSE_ATTN_OLD(pthread_rwlock_wrlock);
SPARSE_ATTN_OLD(pthread_rwlockattr_destroy);
SPARSE_ATTN_OLD(pthread_rwlockattr_init);
SPARSE_ATTN_OLD(pthread_rwlockattr_setpshared);
SPARSE_ATTN_OLD(pthread_setspecific);
SPARSE_ATTN_OLD(pthread_spin_destroy);
SPARSE_ATTN_OLD(pthread_spin_init);
SPARSE_ATTN_OLD(pthread_spin_lock);
SPARSE_ATTN_OLD(pthread_spin_trylock);
SPARSE_ATTN_OLD(pthread_spin_unlock);
SPARSE_ATTN_OLD(sem_destroy);
SPARSE_ATTN_OLD(sem_init);
SPARSE_ATTN_OLD(sem_post);
SPARSE_ATTN_OLD(sem_timedwait);
SPARSE_ATTN_OLD(sem_trywait);
SPARSE_ATTN_OLD(sem_wait);
SPARSE_ATTN_OLD(shm_open);
SPARSE_ATTN_OLD(shm_unlink);
